package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"graindisk/backend"
	"graindisk/backend/transport"
)

// fail gives err its class and its place. It returns nil for nil.
func (s *Store) fail(ctx context.Context, op, key string, err error) error {
	if err == nil {
		return nil
	}
	class, cause := classify(err)
	if class == backend.Transient && ctx.Err() != nil {
		cause = context.Cause(ctx) // the SDK's words for it take three lines
	}
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() == "NoSuchBucket" {
		cause = fmt.Errorf("bucket %q does not exist; create it", s.bucket)
	}
	return &backend.Error{Op: op, Store: s.name, Key: key, Class: class, Err: cause}
}

// classify sorts an error, and makes its message short.
func classify(err error) (backend.Class, error) {
	var own transport.Refused
	var noCreds noCredentials
	var cert *tls.CertificateVerificationError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &own):
		return backend.Permanent, own.Unwrap()
	case errors.Is(err, transport.ErrShort):
		return backend.Short, nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return backend.Transient, err
	case errors.As(err, &noCreds):
		if class, cause := classifySTS(noCreds.error); class != 0 {
			return class, cause
		}
		return backend.Auth, fmt.Errorf("no credentials: %w", noCreds.error)
	case errors.As(err, &cert):
		return backend.Permanent, cert
	}
	var api smithy.APIError
	code, message := "", ""
	if errors.As(err, &api) {
		code, message = api.ErrorCode(), api.ErrorMessage()
	}
	var response *smithyhttp.ResponseError
	if !errors.As(err, &response) || response.HTTPStatusCode() == 0 {
		if code == "" { // no answer at all: refused, reset, timed out, no such host
			return backend.Transient, innermost(err)
		}
		return classOf(code, 0), err
	}
	status := response.HTTPStatusCode()
	if code == "" || code == "UnknownError" {
		code = http.StatusText(status)
	}
	class, cause := classOf(code, status), fmt.Errorf("%s: %s (HTTP %d)", code, message, status)
	if message == "" || message == "UnknownError" || message == code {
		cause = fmt.Errorf("%s (HTTP %d)", code, status)
	}
	if ahead, is := misdated(response); is && class == backend.Auth {
		return backend.Transient, fmt.Errorf("%w; the store's clock was %v ahead of the request's date", cause, ahead)
	}
	return class, cause
}

// skewMax is how far the date of a request may be from the store's time before that may be why it was refused. Stores
// take 15 minutes; it is what the SDK has.
const skewMax = 4 * time.Minute

// misdated tells of a request that was refused by how much the store's clock was ahead of its date, if that may be
// why. The next one is dated better: the SDK and getter learn the store's time from the answer.
func misdated(refusal *smithyhttp.ResponseError) (ahead time.Duration, is bool) {
	answer := refusal.Response.Response
	status := answer.StatusCode
	if answer.Request == nil || status < 400 || status > 499 || answer.Header.Get("Age") != "" {
		return 0, false // a cache's answer has the date of another
	}
	there, err := http.ParseTime(answer.Header.Get("Date"))
	if err != nil {
		return 0, false
	}
	dated, err := time.Parse("20060102T150405Z", answer.Request.Header.Get("X-Amz-Date"))
	if err != nil {
		return 0, false
	}
	ahead = there.Sub(dated)
	return ahead, ahead.Abs() > skewMax
}

// classifySTS judges an answer of the service that gives roles: that it is away says nothing about the
// credentials. It returns 0 for other errors, and for a refusal.
func classifySTS(err error) (backend.Class, error) {
	var op *smithy.OperationError
	if !errors.As(err, &op) || op.Service() != "STS" {
		return 0, nil
	}
	class, cause := classify(op.Err)
	if class != backend.Transient && class != backend.Throttled {
		return 0, nil
	}
	return class, fmt.Errorf("assume the role: %w", cause)
}

// passes tells that trying again may help.
func passes(err error) bool {
	class, _ := classify(err)
	return class == backend.Transient || class == backend.Throttled
}

// innermost drops the SDK's own wrappers, which repeat the operation, from an error of the network.
func innermost(err error) error {
	var send *smithyhttp.RequestSendError
	if errors.As(err, &send) {
		return send.Err
	}
	return err
}

// classOf sorts an answer by its error code, and by its status where servers have no common code.
func classOf(code string, status int) backend.Class {
	switch code {
	case "NoSuchKey":
		return backend.NotFound
	case "NoSuchBucket": // not an empty store: nothing is known of what it held
		return backend.Permanent
	case "PreconditionFailed":
		return backend.Precondition
	case "ConditionalRequestConflict", "OperationAborted", // a rival was under way: nothing was decided
		"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentChecksumMismatch", "InternalError", // lost or damaged on the way
		"NoSuchUpload": // somebody took the parts away: begin anew
		return backend.Transient
	case "AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch":
		return backend.Auth
	case "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull":
		return backend.Full
	case "ServiceUnavailable", "TooManyRequests":
		return backend.Throttled
	case "InvalidRange":
		return backend.Short
	}
	if strings.HasPrefix(code, "SlowDown") || strings.HasPrefix(code, "Throttl") {
		return backend.Throttled
	}
	if _, ok := retry.DefaultThrottleErrorCodes[code]; ok {
		return backend.Throttled
	}
	if _, ok := retry.DefaultRetryableErrorCodes[code]; ok {
		return backend.Transient
	}
	if status == 499 { // nginx: the client closed the request
		return backend.Transient
	}
	return transport.ClassOf(status)
}
