"""The commands as typer sees them: thin calls of typed functions, and what they show."""
