"""What is tuned, and the model that some numbers make. Knows nothing of searching or measuring."""
