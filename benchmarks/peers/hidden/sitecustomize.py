"""Python runs this when it starts: packages that halfbyte does not install are not there for it.

transformers imports scikit-learn, and that SciPy, and torchvision wherever it finds them, which
takes two seconds of a run on a machine that has them for something else.
"""

import sys

for name in ("sklearn", "scipy", "torchvision"):
    sys.modules[name] = None  # type: ignore[assignment]
