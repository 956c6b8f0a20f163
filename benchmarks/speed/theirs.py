"""Measure transformers on torch, as its users run it and as it is fastest."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import GEMM, INSTRUCT_LENGTH, LETTERS, LONG, Figures, gemm_gflops, main, read, timed

BUDGETS = (256, 512, 1024, 2048, 4096)
"""Tokens per batch that `strongest` tries."""
TRIED = 48
RATE = 1e-4


def load(folder: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    """Load the model with torch's fused attention."""
    return transformers.AutoModelForMaskedLM.from_pretrained(
        folder / "base", attn_implementation="sdpa", dtype=dtype, **options
    )


class Questions:
    """Score questions batch by batch, as probabilities `[questions, letters]`."""

    def __init__(self, folder: Path, dtype: Any = torch.float32, asked: str = "mmlu"):
        self.model = load(folder, dtype).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        self.prompts = read(folder, asked)["prompts"]
        ids = [self.tokenizer.encode(f" {x}", add_special_tokens=False) for x in LETTERS]
        self.letters = [one for (one,) in ids]
        self.lengths = [len(self.tokenizer.encode(prompt)) for prompt in self.prompts]
        self.real = self.padded = 0

    def ask(self, batches: list[list[int]], among: str = "letters") -> list[list[float]]:
        """Score the prompts of each batch; the softmax is over `among`."""
        found: dict[int, list[float]] = {}
        self.real = self.padded = 0
        with torch.inference_mode():
            for members in batches:
                inputs = self.tokenizer(
                    [self.prompts[i] for i in members], return_tensors="pt", padding=True
                )
                logits = self.model(**inputs).logits
                rows, columns = (inputs.input_ids == self.tokenizer.mask_token_id).nonzero().T
                at_mask = logits[rows, columns].float()
                if among == "letters":
                    answers = at_mask[:, self.letters].softmax(-1)
                else:
                    answers = at_mask.softmax(-1)[:, self.letters]
                found.update(zip(members, answers.tolist(), strict=True))
                self.real += int(inputs.attention_mask.sum())
                self.padded += inputs.input_ids.numel()
        return [found[i] for i in sorted(found)]

    def figures(self, batches: list[list[int]], among: str = "letters") -> Figures:
        """Time all questions after one batch to warm up."""
        figures, answers = timed(
            partial(self.ask, batches, among), warm_up=partial(self.ask, batches[:1], among)
        )
        return {
            **figures,
            "tokens": self.real,
            "padding": 1 - self.real / self.padded,
            "answers": answers,
        }


def eights(count: int) -> list[list[int]]:
    """Return batches of 8 in the given order."""
    return [list(range(i, min(i + 8, count))) for i in range(0, count, 8)]


def padded(folder: Path, dtype: Any = torch.float32, asked: str = "mmlu") -> Figures:
    """Score padded batches of 8 in the given order."""
    questions = Questions(folder, dtype, asked)
    return questions.figures(eights(len(questions.prompts)))


def one_by_one(folder: Path) -> Figures:
    """Score one prompt at a time with a softmax over the vocabulary, as the published script."""
    questions = Questions(folder)
    return questions.figures([[i] for i in range(len(questions.prompts))], "vocabulary")


def strongest(folder: Path) -> Figures:
    """Score batches sorted by length, with the number of tokens that is fastest on a sample."""
    questions = Questions(folder)
    order = sorted(range(len(questions.prompts)), key=lambda i: -questions.lengths[i])

    def cut(members: list[int], budget: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in members:
            full = batches and (len(batches[-1]) + 1) * questions.lengths[batches[-1][0]] > budget
            if full or not batches:
                batches.append([])
            batches[-1].append(i)
        return batches

    some = order[:: max(1, len(order) // TRIED)]
    speeds = {
        budget: timed(partial(questions.ask, cut(some, budget)))[0]["seconds"] for budget in BUDGETS
    }
    best = min(speeds, key=lambda budget: speeds[budget])
    return {**questions.figures(cut(order, best)), "budget": best}


def local_attention(folder: Path) -> Figures:
    """Compute fused attention at 8192 with the mask of a window of 64 to each side."""
    query, key, value = (torch.randn(1, 12, LONG, 64) for _ in range(3))
    rows = torch.arange(LONG)
    mask = ((rows[:, None] - rows[None]).abs() <= 64)[None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        return timed(partial(attend, query, key, value, attn_mask=mask), repeats=3)[0]


def encode_long(folder: Path) -> Figures:
    """Run the encoder on one row of 8192."""
    model = load(folder).eval().model
    ids = torch.tensor([read(folder, "long")])
    with torch.inference_mode():
        return timed(lambda: model(ids).last_hidden_state)[0]


def score_long(folder: Path) -> Figures:
    """Score the mask of one text of 8192 with the whole model."""
    model = load(folder).eval()
    ids = torch.tensor([read(folder, "long")])
    with torch.inference_mode():
        return timed(lambda: model(ids).logits[0, -2].softmax(-1))[0]


def training(folder: Path, sparse: bool = False) -> Figures:
    """Make an update on 8 rows of 128 tokens with fused AdamW."""
    model = load(folder, sparse_prediction=sparse).train()
    batch = {name: torch.tensor(values) for name, values in read(folder, "train").items()}
    update = updater(model)
    return timed(lambda: update(batch["ids"], batch["labels"]), repeats=5)[0]


def updater(model: Any) -> Any:
    """Return a function `(ids, labels, attention_mask) -> loss` that makes one update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def update(ids: Any, labels: Any, attention_mask: Any = None) -> float:
        loss = model(input_ids=ids, labels=labels, attention_mask=attention_mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return update


def instruct(folder: Path) -> Figures:
    """Train on instruction rows, each padded to 512, 8 at a time; time one row."""
    content = read(folder, "instruct")
    model = load(folder).train()
    update = updater(model)
    pad = model.config.pad_token_id
    batches = []
    for start in (0, 8, 16):
        ids = torch.full((8, INSTRUCT_LENGTH), pad)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(content["examples"][start : start + 8]):
            ids[row, : len(example["ids"])] = torch.tensor(example["ids"])
            labels[row, example["slot"]] = example["answer"]
        batches.append((ids, labels, (ids != pad).long()))
    figures, _ = timed(
        lambda: [update(*batch) for batch in batches[1:]], warm_up=lambda: update(*batches[0])
    )
    real = sum(int(mask.sum()) for *_, mask in batches[1:])
    return {
        "seconds": figures["seconds"] / 16,
        "padding": 1 - real / (16 * INSTRUCT_LENGTH),
        "rows": 16,
    }


def gemm() -> float:
    """Return torch's GFLOP/s of a plain product."""
    rows, inputs, outputs = GEMM
    x, w = torch.randn(rows, inputs), torch.randn(inputs, outputs)
    return gemm_gflops(lambda: x @ w)


FUNCTIONS = {
    "padded": padded,
    "few_bfloat16": partial(padded, dtype=torch.bfloat16, asked="few"),
    "strongest": strongest,
    "one_by_one": one_by_one,
    "local_attention": local_attention,
    "encode_long": encode_long,
    "score_long": score_long,
    "training": training,
    "training_sparse": partial(training, sparse=True),
    "instruct": instruct,
}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    main(FUNCTIONS, gemm)
