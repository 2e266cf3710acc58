"""`maskgit evaluate`: how good generators, folders of images and tokenizers are."""

HELP = "measure generators, images and tokenizers"
EXAMPLE = "maskgit evaluate generator --reference emoji --extractor emoji --num 256"
# Each a module beside, `clip-score` in clip_score.py.
COMMANDS = ("generator", "images", "tokenizer", "clip", "clip-score", "sweep", "compare")
