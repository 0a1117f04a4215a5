"""Training with the Hugging Face Trainer: `QuietStarTrainer` and `QuietStarCallback`."""
