"""Networks: the zoo, frozen teachers, branchy students, attention and discriminators."""
