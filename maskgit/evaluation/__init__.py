"""How good generators and tokenizers are, and under which protocol each number was measured."""
