"""What is said of an adapter or a model beside its files."""
