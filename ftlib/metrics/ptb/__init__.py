"""The Stanford PTB tokenizer 3.4.1 in Python: its lexer, its grammar, its tokens."""
