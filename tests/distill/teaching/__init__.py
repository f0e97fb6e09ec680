"""What teachers say: encoded, kept, asked for."""
