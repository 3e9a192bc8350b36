// Package reopen kills a gateway with much unpublished and measures what its return takes.
package reopen
