"""Gates and costs: what `dpar bench` and `dpar flops` measure."""
