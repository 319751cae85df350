"""Every setting of a model and of a run, the recipes, and their JSON files."""
