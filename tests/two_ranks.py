"""For test_ranks.py, under torchrun: the commands given as JSON, one after the other, in every process.

python two_ranks.py '[["evaluate", ...], ["render", ...]]'
"""

import json
import sys

import torch

from idnerf.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
