"""What explaining costs on a machine: methods timed in turn with the model's bare encode, once their maps are right."""
