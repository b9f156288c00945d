"""Home of the GPU kernels, one file per operator; none is written yet."""
