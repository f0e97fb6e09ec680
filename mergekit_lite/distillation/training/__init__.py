"""The parts of the train stage: rows as tokens, the trainer, reference log-probabilities, the working folder."""
