"""Language models behind one interface: recording and finetuning attention; tokens, no tasks."""
