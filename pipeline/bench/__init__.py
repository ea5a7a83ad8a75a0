"""Gates of `dpar bench` and MAC counts of `dpar flops`."""
