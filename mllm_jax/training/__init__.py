"""Training: stages of a recipe, planned (`stage`), fed (`sources`), stepped (`step`) and kept (`checkpoint`)."""
