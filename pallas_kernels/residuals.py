"""Names of what gradient rules keep, for policies of `jax.checkpoint` (`v4jax.nn.remat`).

A rule names its residuals where it makes them: a name that is given to its result afterwards is another
array's, and the kernel would run again for the one without a name.
"""

ATTENDED = "attended"  # outputs and log denominators of attention
