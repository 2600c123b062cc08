//! Values are equal where they are written alike: `Protocol::Other(6)` is TCP to every kernel, and to whoever compares what
//! is wanted with what is listed.

/// Implements comparison and hashing of a type by what is written of it.
macro_rules! equal_as_written {
    ($type:ty, $it:ident => $written:expr) => {
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other).is_eq()
            }
        }

        impl Eq for $type {}

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $type {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                fn written($it: &$type) -> impl Ord + std::hash::Hash + '_ {
                    $written
                }
                written(self).cmp(&written(other))
            }
        }

        impl std::hash::Hash for $type {
            fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
                let $it = self;
                $written.hash(state);
            }
        }
    };
}

pub(crate) use equal_as_written;
