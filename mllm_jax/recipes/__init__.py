"""What several recipes in `configs/` have in common."""
