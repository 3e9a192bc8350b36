// Package share runs pools that have nothing but their prefixes to keep them apart in the same buckets and containers.
package share
