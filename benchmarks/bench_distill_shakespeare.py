"""Ways to distil a KV cache with enough power to tell them apart: a small teacher trained on Shakespeare, all arms.

    python benchmarks/bench_distill_shakespeare.py [--seeds N] [--size gpu [--workers N]] [--save]

None, flat, structured, structured with a width projection a head, and structured from a random head map; at equal
steps, batches and starts. The result has a verdict on each of document 004's four claims, whatever it is. What was
trained is found again under --out, so a stopped benchmark goes on. On two cores about 25 minutes.
"""

from __future__ import annotations

from distilling import SIZES, figures_of, keep, options, teacher_of
from headwise.lab.ab import ab
from headwise.lab.ab.markdown import markdown
from headwise.lab.ab.words import sentences

ARMS = "none,flat,structured,structured:share=no,structured:init=random"

if __name__ == "__main__":
    given = options(__doc__)
    size = SIZES[given.size]
    teacher = teacher_of(size, given.size, given.out)
    result = ab(
        teacher=str(teacher),
        student=size.student,
        arms=ARMS,
        seeds=given.seeds,
        data="shakespeare",
        steps=given.steps or size.steps,
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        lr=size.lr,
        cache_teacher=given.size == "cpu",  # a GPU asks the teacher faster than a disk answers
        cache_dtype="int8",
        workers=given.workers,
        keep_checkpoints=False,
        out=given.out / f"bench-distill-shakespeare-{given.size}",
        progress=True,
    )
    print("\n".join(sentences(result)))
    reached = {
        "at least 6 seeds finished in every arm": all(
            sum(loss is not None for loss in variant.val_loss.per_seed) >= 6 for variant in result.variants
        ),
        "a verdict on each of the four claims": len(figures_of(result)["claims"]) == 4,
    }
    keep(f"distill-shakespeare-{given.size}", figures_of(result), reached, given.save, md=markdown(result))
