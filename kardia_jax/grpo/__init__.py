"""Group-relative policy optimisation: pure maths (advantages, losses, KL, correction) and the update."""
