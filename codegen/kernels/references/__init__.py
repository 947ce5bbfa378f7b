"""What each kernel computes, in plain torch."""
