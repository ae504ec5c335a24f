"""What a fused model is worth: losses by domain, with intervals, beside the alternatives."""
