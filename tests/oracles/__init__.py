"""What tests compare with: computed in another way, independent of the code under test."""
