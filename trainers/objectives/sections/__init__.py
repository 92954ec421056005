"""The keys of the objectives in a recipe, a file a family."""
