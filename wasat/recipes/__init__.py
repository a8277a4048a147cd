"""What ``wasat train`` reads: recipes, tasks, mixtures, and how a trained model is measured."""
