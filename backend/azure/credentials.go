package azure

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"

	"graindisk/backend"
)

// Credentials are at most one of three; without any the SDK's own chain is asked (environment, workload identity,
// managed identity, Azure CLI).
type Credentials struct {
	AccountKey       string // shared key
	SAS              string // shared access signature: the query, with or without its question mark
	ConnectionString string
}

func (c Credentials) validate() error {
	given := 0
	for _, s := range []string{c.AccountKey, c.SAS, c.ConnectionString} {
		if s != "" {
			given++
		}
	}
	if given > 1 {
		return errors.New("an account key, a SAS or a connection string: only one of them")
	}
	return nil
}

// session is one set of credentials in use.
type session struct {
	cred      Credentials
	service   *service.Client
	container *container.Client
}

// newSession makes clients that sign with c.
func newSession(o Options, c Credentials, client *http.Client) (*session, error) {
	so := &service.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport: client,
		Retry:     o.retries(),
		Telemetry: policy.TelemetryOptions{Disabled: true},
	}}
	s := &session{cred: c}
	at := strings.TrimRight(o.Endpoint, "/")
	if at == "" {
		at = "https://" + o.Account + ".blob.core.windows.net"
	}
	var err error
	switch {
	case c.ConnectionString != "":
		if s.service, err = service.NewClientFromConnectionString(c.ConnectionString, so); err != nil {
			return nil, errors.New("the connection string cannot be read") // err might repeat it
		}
	case c.AccountKey != "":
		key, kerr := service.NewSharedKeyCredential(o.Account, c.AccountKey)
		if kerr != nil {
			return nil, errors.New("the account key is not base64")
		}
		s.service, err = service.NewClientWithSharedKeyCredential(at, key, so)
	case c.SAS != "":
		s.service, err = service.NewClientWithNoCredential(at+"?"+strings.TrimPrefix(c.SAS, "?"), so)
	default:
		chain, cerr := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
			ClientOptions: azcore.ClientOptions{Transport: client},
		})
		if cerr != nil {
			return nil, fmt.Errorf("no credentials: %w", cerr)
		}
		s.service, err = service.NewClient(at, taggedCredential{chain}, so)
	}
	if err != nil {
		return nil, errors.New("the account does not make a URL") // err might repeat a signature
	}
	s.container = s.service.NewContainerClient(o.Container)
	return s, nil
}

// retries are the SDK's own.
func (o Options) retries() policy.RetryOptions {
	r := policy.RetryOptions{MaxRetries: 2, RetryDelay: 200 * time.Millisecond, MaxRetryDelay: 500 * time.Millisecond}
	if o.Attempts > 0 {
		r.MaxRetries = int32(o.Attempts - 1)
	}
	if r.MaxRetries == 0 {
		r.MaxRetries = -1 // 0 is the SDK's default, 3
	}
	return r
}

// place is the container's URL without a signature.
func (s *session) place() (*url.URL, error) {
	u, err := url.Parse(s.container.URL())
	if err != nil {
		return nil, errors.New("the account does not make a URL")
	}
	u.RawQuery = ""
	return u, nil
}

var _ backend.Refresher = (*Store)(nil)

// Refresh implements backend.Refresher: it asks Options.Renew or, where the SDK's chain is asked, begins that
// anew, without the tokens that it kept.
func (s *Store) Refresh(ctx context.Context) (changed bool, err error) {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	old := s.session.Load()
	c := old.cred
	if s.o.Renew != nil {
		if c, err = s.o.Renew(ctx); err != nil {
			return false, fmt.Errorf("azure: get the credentials again: %w", err)
		}
	}
	if c == old.cred && c != (Credentials{}) {
		return false, nil
	}
	if err := c.validate(); err != nil {
		return false, fmt.Errorf("azure: new credentials: %w", err)
	}
	renewed, err := newSession(s.o, c, s.http)
	if err != nil {
		return false, fmt.Errorf("azure: new credentials: %w", err)
	}
	was, err := old.place()
	is, ierr := renewed.place()
	if err = errors.Join(err, ierr); err != nil {
		return false, fmt.Errorf("azure: new credentials: %w", err)
	}
	if *was != *is {
		return false, fmt.Errorf("azure: the new credentials are for %s, not %s", is.Host, was.Host)
	}
	s.session.Store(renewed)
	return true, nil
}

// taggedCredential lets errors of getting a token be told from those of using it.
type taggedCredential struct{ azcore.TokenCredential }

type noCredentials struct{ error }

func (e noCredentials) Unwrap() error { return e.error }

// GetToken implements azcore.TokenCredential.
func (c taggedCredential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	t, err := c.TokenCredential.GetToken(ctx, o)
	if err != nil {
		return t, noCredentials{err}
	}
	return t, nil
}
