"""A pool whose models are stand-ins: all of it is real but the arithmetic of the layers."""
