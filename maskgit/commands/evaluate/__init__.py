"""`maskgit evaluate`: how good generators, folders of images and tokenizers are."""

HELP = "measure generators, images and tokenizers"
EXAMPLE = "maskgit evaluate generator --reference emoji --extractor emoji --num 256"
COMMANDS = ("generator", "images", "tokenizer", "sweep", "compare")  # each a module beside
