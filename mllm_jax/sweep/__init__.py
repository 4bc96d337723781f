"""Many runs of one recipe: named configuration overrides, and what runs them."""
