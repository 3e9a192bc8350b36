package azure

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"

	"graindisk/backend"
	"graindisk/backend/transport"
)

// fail gives err its class and its place. It returns nil for nil. No cause names a URL, which may carry
// a signature.
func (s *Store) fail(ctx context.Context, op, key string, err error) error {
	if err == nil {
		return nil
	}
	class, cause := classify(err)
	if class == backend.Transient && ctx.Err() != nil {
		cause = context.Cause(ctx)
	}
	if bloberror.HasCode(err, bloberror.ContainerNotFound) {
		cause = fmt.Errorf("container %q does not exist; create it", s.o.Container)
	}
	return &backend.Error{Op: op, Store: s.name, Key: key, Class: class, Err: cause}
}

// classify sorts an error, and makes its message short.
func classify(err error) (backend.Class, error) {
	var own transport.Refused
	var noCreds noCredentials
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &own):
		return backend.Permanent, own.Unwrap()
	case errors.Is(err, transport.ErrShort):
		return backend.Short, nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return backend.Transient, plain(err)
	case errors.As(err, &noCreds):
		return backend.Auth, errors.New("no credentials: none of the places where Azure's SDK looks gives a token")
	case errors.As(err, &cert):
		return backend.Permanent, cert
	}
	var response *azcore.ResponseError
	if !errors.As(err, &response) { // no answer at all: refused, reset, timed out, no such host
		return backend.Transient, plain(err)
	}
	code := response.ErrorCode
	if code == "" {
		code = http.StatusText(response.StatusCode)
	}
	return classOf(bloberror.Code(response.ErrorCode), response.StatusCode), fmt.Errorf("%s (HTTP %d)", code, response.StatusCode)
}

// plain drops the request's URL from an error of the network.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// classOf sorts an answer by its error code, and by its status where the code says nothing.
func classOf(code bloberror.Code, status int) backend.Class {
	switch code {
	case bloberror.BlobNotFound, bloberror.ResourceNotFound:
		return backend.NotFound
	case bloberror.ContainerNotFound, bloberror.ContainerDisabled, bloberror.AccountIsDisabled, // not an empty store
		bloberror.LeaseIDMissing, bloberror.BlobImmutableDueToPolicy, // somebody's lease or policy is on the blob
		bloberror.BlobArchived, bloberror.BlobBeingRehydrated, bloberror.InvalidBlobType:
		return backend.Permanent
	case bloberror.ConditionNotMet, bloberror.BlobAlreadyExists, bloberror.ResourceAlreadyExists, bloberror.TargetConditionNotMet:
		return backend.Precondition
	case bloberror.MD5Mismatch, bloberror.CRC64Mismatch, bloberror.InternalError, bloberror.OperationTimedOut,
		bloberror.ContainerBeingDeleted:
		return backend.Transient
	case bloberror.ServerBusy:
		return backend.Throttled
	case bloberror.InvalidRange:
		return backend.Short
	}
	return transport.ClassOf(status) // of a HEAD that found nothing, too: it has no body, but the code in a header
}
