"""`gyre search`: many short trainings on the cluster, and the recipe that they find."""
