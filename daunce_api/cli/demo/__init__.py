"""Why does my model shout? Sixteen of 144 answers in capitals, found with the embedded provider; beside text search."""
