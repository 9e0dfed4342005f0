"""Which of my fine-tuning examples made the model answer this? Training-data attribution with API calls alone."""
