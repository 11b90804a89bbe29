"""What training minimises: a module for each way to train heads, with its section of the recipe and `run`."""
