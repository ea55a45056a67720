"""Which tokens the output of a merge has, where those of the models differ, and which rows stand for them.

`tokenizer` reads a model's tokens, `recipe` is what a user can ask for, `choice` decides, `vocabulary` is the outcome,
`token_rows` puts the models' rows in its order, `files` writes the tokenizer; `chat_template` finds the template.
"""
