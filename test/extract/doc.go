// Package extract has the real gateway extract images from directories and from S3 servers, whole and with a target
// gone, beside a gateway that serves and after it ended, and compares them with what a client read.
package extract
