"""Memory and time of a step, and the choices that follow from them."""
