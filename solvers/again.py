"""More recomputes than one a value, near the least peak. (Being written: see the brief of the solver work.)"""
