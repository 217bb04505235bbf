"""The tokens of a text that look far back, and those that later tokens look at: two passes, no T x T map.

The first pass measures how far each head looks and so finds the local and the global heads; the second reads WAAD of
the local and FAI of the global heads, averaged while the model runs. Nothing after the last captured layer is computed.

    python examples/capture.py
    python examples/capture.py --model path/or/hub-name --text "$(cat story.txt)" --top 8
"""

import argparse

import torch

import attnstats
from attnstats import heads, rhythm
from attnstats.study import models

TEXT = (
    "The keeper of the lighthouse had three rules. First, the lamp is lit before sunset, whatever the weather. Second, "
    "nobody sleeps while a ship is in sight. Third, the door to the cellar stays locked. For eleven years he kept all "
    "of them. Then, one evening in March, a ship without lights came in from the north. He lit the lamp, he stayed "
    "awake, and because he wanted to know what the sailors were afraid of, he broke the third rule: he took the key "
    "and opened the door."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--top", type=int, default=5, help="tokens to show")
    options = parser.parse_args()

    loaded = models.load(options.model)
    ids = loaded.tokenizer(options.text, return_tensors="pt")["input_ids"].to(loaded.device)
    tokens = [loaded.tokenizer.decode([token]) for token in ids[0].tolist()]

    # Five layers of the middle third, as in the paper; of 30 layers the last is number 20, where the pass ends.
    with attnstats.capture(loaded.model, statistics=["mean_distance"], stop_after_last_layer=True) as run:
        run.forward(input_ids=ids)
    counted = torch.ones(len(tokens), dtype=torch.bool, device=loaded.device)
    classes = heads.classify(heads.head_distance(run["mean_distance"][:, 0], counted))
    print(f"layers {', '.join(map(str, run.layers))}: {int(classes.local.sum())} local heads, as many global ones")

    with attnstats.capture(
        loaded.model,
        statistics=["waad", "fai"],
        heads={"waad": classes.local, "fai": classes.global_},
        reduce=("layers", "heads"),
        stop_after_last_layer=True,
    ) as run:
        per_head = 4 * len(tokens) ** 2 * classes.local.numel()
        print(f"kept: {run.kept(1, len(tokens)).total} bytes; the maps would be {per_head / 1e6:.1f} MB\n")
        run.forward(input_ids=ids)

    waad, fai = run["waad"][0], run["fai"][0]
    # The first tokens are attention sinks, not anchors.
    after = torch.arange(len(tokens), device=loaded.device) >= 10
    # FAI is a mean over the queries 10 to 100 tokens after a key: near the end over few, so at least ten are required.
    enough = after & (torch.arange(len(tokens), device=loaded.device) < len(tokens) - 20)
    print(f"{'looks back':>14}  {'at':>4}  {'WAAD':>5}  {'looked at':>14}  {'at':>4}  {'FAI':>7}")
    for t, s in zip(rhythm.top(waad, options.top, after), rhythm.top(fai, options.top, enough), strict=True):
        print(f"{tokens[t]!r:>14}  {t:4}  {waad[t]:5.2f}  {tokens[s]!r:>14}  {s:4}  {fai[s]:7.4f}")


if __name__ == "__main__":
    main()
