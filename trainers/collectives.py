"""Every collective of a step, and the one place where a gradient is scaled by the number of workers.

The algebra. The loss is a mean over the B queries of the global batch, L = (1/B) sum_i l_i. The objective
returns on each worker its own share of that sum, L_r = (1/B) sum_{i on r} l_i, so L = sum_r L_r, and its
backward leaves in the worker's embeddings the gradient of the *whole* L (the exchange has added every other
worker's share). A parameter w is reached by each worker through its own texts only:

    dL/dw = sum_r  dL/dE_r . dE_r/dw

that is, the sum over workers of what each one's backward gives. DeepSpeed (like DDP) divides that sum by W.
So the gradient handed to the engine is multiplied by W, here (`engine_gradient_scale`) and nowhere else.
"""
