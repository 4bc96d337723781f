"""A GPT model as the judge of answers: what it is asked, sending it, and the stored judgements."""
