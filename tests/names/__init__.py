"""Public names and signatures against the installed peft's."""
