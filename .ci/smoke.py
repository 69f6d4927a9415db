"""One step with the installed package: `python .ci/smoke.py` prints which file was imported and who serves the CPU.

`--native` makes it an error that the native CPU library is not there. What is imported is what was installed, wherever
it runs: Python looks into the folder of a script, not into the current one.
"""

import json
import sys

import torch

import sparse_bwd as sb
from sparse_bwd.ops import backend

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Flatten(), torch.nn.Linear(128, 2),
)  # fmt: skip
images = torch.randn(2, 3, 10, 10)
sb.convert(model)
sb.RandomPolicy(model, sb.Budget(fraction=0.5)).step()
model(images).sum().backward()
told = {
    "file": sb.__file__,
    "missing": backend.missing("cpu"),
    "trained": sum(parameter.grad is not None for parameter in sb.trainable_parameters(model)),
}
print(json.dumps(told))
if not told["trained"] or ("--native" in sys.argv and told["missing"]):
    sys.exit(f"The installed package does not do what it should: {told}")
