"""The one error that a user's input can raise."""


class UserError(ValueError):
  """Wrong input: the message says what was wrong, what was expected and what to do, with the key, file or line at fault."""
