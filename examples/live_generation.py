"""WAAD of every token as soon as the model generates it, and a rule of your own that ends the answer.

`live=True` keeps statistics up to date while the model generates: each step costs O(window + horizon), and FAI of older
tokens grows as later ones look at them. WAAD is of the heads that are local on the prompt, FAI of the global ones. Here
the answer ends once one of its tokens has become an anchor, that is, once its FAI reaches --anchor. At the end one
teacher-forced pass over the same tokens must give the same numbers.

    python examples/live_generation.py
    python examples/live_generation.py --question "Why is the sky blue?" --anchor 0.02 --max-tokens 200
"""

import argparse

import torch

import attnstats
from attnstats import heads
from attnstats.study import models
from attnstats.study.chat import render
from attnstats.study.prompts import QUESTIONS, SYSTEM
from attnstats.transformers.run import Capture

LO = 10  # FAI(10, 100), the default, counts queries from this distance on
FLOOR = 4  # WAAD at which a bar begins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--question", default=QUESTIONS[0])
    parser.add_argument("--anchor", type=float, default=0.02, help="FAI that ends the answer")
    parser.add_argument("--seen-by", type=int, default=10, help="least number of later tokens in the mean of FAI")
    parser.add_argument("--max-tokens", type=int, default=100)
    options = parser.parse_args()

    loaded = models.load(options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = render(tokenizer, options.question, SYSTEM)

    def show(run: Capture) -> bool:
        """Called after every forward pass; True ends the generation."""
        if run.length == len(prompt):  # the prompt went through in one pass
            return False
        waad = float(run["waad"][0, -1])
        print(
            f"{tokenizer.decode(run.tokens[0, -1:])!r:>14}  {waad:5.2f}  {'#' * round(8 * max(0.0, waad - FLOOR))}",
            flush=True,
        )
        # The tokens of the answer with at least --seen-by later queries in their horizon.
        fai = run["fai"][0, len(prompt) : run.length - LO - options.seen_by + 1]
        if not len(fai) or fai.max() < options.anchor:
            return False
        anchor = len(prompt) + int(fai.argmax())
        print(f"\n{tokenizer.decode(run.tokens[0, anchor])!r} at {anchor} is an anchor: its FAI is {fai.max():.4f}")
        return True

    ids = torch.tensor([prompt], device=loaded.device)
    with attnstats.capture(model, statistics=["mean_distance"], stop_after_last_layer=True) as run:
        run.forward(input_ids=ids)
    counted = torch.ones(len(prompt), dtype=torch.bool, device=loaded.device)
    classes = heads.classify(heads.head_distance(run["mean_distance"][:, 0], counted))
    settings = {
        "statistics": ["waad", "fai"],
        "heads": {"waad": classes.local, "fai": classes.global_},
        "reduce": ("layers", "heads"),
    }
    print(f"{'token':>14}   WAAD")
    with attnstats.capture(model, **settings, live=True, on_token=show) as live:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_tokens,
            do_sample=False,
            stopping_criteria=[live.should_stop],
        )

    with attnstats.capture(model, **settings, stop_after_last_layer=True) as forced:
        forced.forward(input_ids=live.tokens)
    decoded = live.length - len(prompt)
    print(f"\n{decoded} of {live.length} tokens were decoded one by one; largest difference to one pass over all:")
    for name in ("waad", "fai"):
        print(f"  {name:4}  {(live[name] - forced[name]).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
