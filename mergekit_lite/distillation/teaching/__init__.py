"""What teachers say of given responses, token by token: asked once, kept in files, read while a student trains."""
