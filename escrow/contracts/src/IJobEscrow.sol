// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title ERC-8183, the text of 2026-03-13, with the parameters that the text calls optional
/// @notice A job: a client locks a budget, a provider submits, an evaluator completes or rejects,
/// and at expiry anybody may send the budget back to the client.
interface IERC8183 {
    /// @notice Where a job stands. Only forward moves exist.
    enum Status {
        Open,
        Funded,
        Submitted,
        Completed,
        Rejected,
        Expired
    }

    /// @notice A job as `getJob` tells it. The last two fields follow those of the text.
    struct JobView {
        uint256 id;
        address client;
        address provider;
        address evaluator;
        string description;
        uint256 budget;
        uint256 expiredAt;
        Status status;
        address hook;
        uint256 submittedAt;
        bytes32 deliverable;
    }

    event JobCreated(
        uint256 indexed jobId,
        address indexed client,
        address indexed provider,
        address evaluator,
        uint256 expiredAt,
        address hook
    );
    event ProviderSet(uint256 indexed jobId, address indexed provider);
    event BudgetSet(uint256 indexed jobId, uint256 amount);
    event JobFunded(uint256 indexed jobId, address indexed client, uint256 amount);
    event JobSubmitted(uint256 indexed jobId, address indexed provider, bytes32 deliverable);
    event JobCompleted(uint256 indexed jobId, address indexed evaluator, bytes32 reason);
    event JobRejected(uint256 indexed jobId, address indexed rejector, bytes32 reason);
    event JobExpired(uint256 indexed jobId);
    event PaymentReleased(uint256 indexed jobId, address indexed provider, uint256 amount);
    event Refunded(uint256 indexed jobId, address indexed client, uint256 amount);

    /// @notice No job has this id.
    error JobNotFound(uint256 jobId);
    /// @notice The job is not in a status from which this can be done.
    error WrongStatus(uint256 jobId, Status status);
    /// @notice The caller does not hold the role that may do this.
    error NotAllowed(uint256 jobId, address caller);
    /// @notice The job is a deal: its client and evaluator is this contract, which moves it by Terms.
    error JobIsDeal(uint256 jobId);
    /// @notice It is too late: the last moment was `limit`.
    error TooLate(uint256 jobId, uint256 limit);
    /// @notice It is too early: the act opens after `limit` (for `claimRefund`, at `limit`).
    error TooEarly(uint256 jobId, uint256 limit);
    /// @notice The provider is missing, set already, this contract, or the evaluator.
    error BadProvider(address provider);
    /// @notice The evaluator is missing, this contract, or the provider.
    error BadEvaluator(address evaluator);
    /// @notice The expiry is not in the future, or does not fit 40 bits.
    error BadExpiry(uint256 expiredAt);
    /// @notice The budget is zero or does not fit 128 bits.
    error BadBudget(uint256 amount);
    /// @notice The budget is not the one that the client expected.
    error BudgetChanged(uint256 expected, uint256 actual);
    /// @notice Hooks do not exist here. A client who asks for one must not be left without it.
    error HookNotSupported(address hook);
    /// @notice The token moved another amount than was asked for.
    error WrongAmountReceived(uint256 expected, uint256 balanceBefore, uint256 balanceAfter);

    /// @notice Opens a job. `provider` may be zero and be set later.
    /// @return jobId counted from 1
    function createJob(
        address provider,
        address evaluator,
        uint256 expiredAt,
        string calldata description,
        address hook
    ) external returns (uint256 jobId);

    /// @notice Names the provider, once. Client only, Open only.
    function setProvider(uint256 jobId, address provider, bytes calldata optParams) external;

    /// @notice Proposes a budget. Client or provider, Open only.
    function setBudget(uint256 jobId, uint256 amount, bytes calldata optParams) external;

    /// @notice Locks the budget, if it is the expected one. Client only, Open only.
    function fund(uint256 jobId, uint256 expectedBudget, bytes calldata optParams) external;

    /// @notice Submits the hash of the work. Provider only, Funded only; a deal also within its time.
    function submit(uint256 jobId, bytes32 deliverable, bytes calldata optParams) external;

    /// @notice Pays the provider. Evaluator only, Submitted only.
    function complete(uint256 jobId, bytes32 reason, bytes calldata optParams) external;

    /// @notice Ends the job without payment. Client while Open, evaluator while Funded or Submitted.
    function reject(uint256 jobId, bytes32 reason, bytes calldata optParams) external;

    /// @notice Expires a Funded or Submitted job at or after `expiredAt`. Anybody may call.
    /// @dev A plain job's budget goes back to the client. A deal's client is this contract, so the
    /// money stays here and `poke` pays it out by the rule that the silence calls for.
    function claimRefund(uint256 jobId) external;

    /// @notice The job, plain or deal.
    /// @dev For a deal: client and evaluator are this contract, the description names the Terms, and
    /// `submittedAt` is zero when not submitted or when a dispute has overwritten it.
    function getJob(uint256 jobId) external view returns (JobView memory);

    /// @notice How many plain jobs were ever created; also the id of the newest.
    function jobCounter() external view returns (uint256);

    /// @notice The one ERC-20 token of this contract.
    function token() external view returns (address);
}

/// @title Escrow for deals: two signatures lock a price, and every silence has a named outcome
/// @notice A deal is an ERC-8183 job whose client and evaluator is this contract and whose provider
/// is the seller. Its id is the EIP-712 digest of its Terms; nothing of the Terms is stored but that,
/// so later calls bring them again.
///
/// No owner, no pause, no upgrade. Anybody may send the calls that need no consent.
///
/// Windows are half open: an act is allowed while now <= limit, its silence counts once now > limit.
///
/// | phase     | limit                  | act                        | silence, by `poke`        |
/// |-----------|------------------------|----------------------------|---------------------------|
/// | working   | deliverBy              | seller submits or declines | all to the buyer          |
/// | delivered | submit + disputeSecs   | buyer disputes             | all to the seller         |
/// | disputed  | dispute + answerSecs   | seller answers             | all to the buyer          |
/// | answered  | answer + ruleSecs      | arbiter rules              | defaultToSeller, the rest |
///
/// Buyer and seller may settle by signature in any of them.
///
/// A stake is reserved in the vault by `open`; nothing else here calls the vault. Whoever closes the
/// seller's slice there reads `outcome`.
///
/// EIP-712 domain: {"Coase JobEscrow", "1", chainId, this contract}. Types:
///   Terms(address buyer,address seller,address asset,uint256 price,address arbiter,uint256 bond,
///     uint256 defaultToSeller,uint256 lockBy,uint256 deliverBy,uint256 disputeSecs,
///     uint256 answerSecs,uint256 ruleSecs,address vault,uint256 stake,Work work,uint256 nonce)
///   Work(string capability,bytes32 schemas,bytes32 task,string pricing,uint256 inputPrice,
///     uint256 cachedInputPrice,uint256 outputPrice,uint256 secondPrice,uint256 inputMax,
///     uint256 outputMax,uint256 quality,string model,string verification,string tokenizer,
///     string settlement)
///   Settlement(uint256 jobId,bytes32 deliverable,uint256 toSeller)
///   Delivery(uint256 jobId,bytes32 deliverable)
///   Dispute(uint256 jobId,bytes32 evidence)
///   Answer(uint256 jobId,bytes32 evidence)
///   Ruling(uint256 jobId,uint256 toSeller,uint256 penalty,bytes32 evidence)
interface IJobEscrow is IERC8183 {
    /// @notice What both sides signed. `work` is the EIP-712 hash of the nested Work.
    struct Terms {
        address buyer;
        address seller;
        address asset;
        /// The cap that is locked; a settlement below it pays the rest back.
        uint256 price;
        /// Zero: nobody; then delivery plus silence pays, and there is no dispute.
        address arbiter;
        /// What each side posts in a dispute.
        uint256 bond;
        /// The seller's part if the arbiter stays silent.
        uint256 defaultToSeller;
        uint256 lockBy;
        uint256 deliverBy;
        uint256 disputeSecs;
        uint256 answerSecs;
        uint256 ruleSecs;
        /// Where the seller's stake lies and how much of it is bound to this deal; both zero: none. The
        /// vault is whatever both signed: look whose code is there. Needs an arbiter.
        address vault;
        uint256 stake;
        bytes32 work;
        /// Chosen by the seller; of all Terms with one nonce only one can open.
        uint256 nonce;
    }

    /// @notice How the payer's tokens get here. Kind 0: allowance. Kind 1: EIP-2612 permit, `deadline`
    /// and `sig`. Kind 2: EIP-3009 receiveWithAuthorization, `validAfter`, `deadline` as validBefore,
    /// and `sig`; its nonce must be the one that this contract derives from the job id.
    struct Funding {
        uint8 kind;
        uint256 validAfter;
        uint256 deadline;
        bytes sig;
    }

    /// @notice One row of `settleMany`: the arguments of `settle`.
    struct Settle {
        Terms terms;
        bytes32 deliverable;
        uint256 toSeller;
        bytes buyerSig;
        bytes sellerSig;
    }

    /// @notice How a deal ended. The closed phase is 16 plus this.
    enum How {
        Open,
        Settled,
        Undelivered,
        Declined,
        SilentBuyer,
        SilentSeller,
        Ruled,
        SilentArbiter
    }

    /// @notice The whole Terms are in the log: enough to finish any deal after the loss of a disk.
    event DealOpened(uint256 indexed jobId, address indexed buyer, address indexed seller, Terms terms);
    event DealDisputed(uint256 indexed jobId, address indexed buyer, bytes32 evidence);
    event DealAnswered(uint256 indexed jobId, address indexed seller, bytes32 evidence);
    event DealRuled(
        uint256 indexed jobId, address indexed arbiter, uint256 toSeller, uint256 penalty, bytes32 evidence
    );
    /// @notice The authority on who got what of the price. `toSeller + toBuyer` is the price; bonds
    /// are apart: returned whole, or shared out by a ruling.
    event DealSettled(
        uint256 indexed jobId,
        address indexed buyer,
        address indexed seller,
        uint256 toSeller,
        uint256 toBuyer,
        How how
    );
    /// @notice These Terms can no longer open.
    event TermsCancelled(uint256 indexed jobId, address indexed by);
    event NoncesInvalidated(address indexed seller, uint256 indexed word, uint256 mask);
    /// @notice A payment did not go through and waits for `withdraw`.
    event PaymentOwed(address indexed to, uint256 amount);
    event Withdrawn(address indexed to, uint256 amount);

    /// @notice The deal is not in a phase from which this can be done.
    error WrongPhase(uint256 jobId, uint8 phase);
    /// @notice These Terms were opened or cancelled before.
    error JobExists(uint256 jobId);
    /// @notice The seller's nonce was used or invalidated before.
    error NonceUsed(address seller, uint256 nonce);
    /// @notice The signature is not one of `signer`, and `signer` is not the caller.
    error BadSignature(address signer);
    /// @notice The Terms are for another token.
    error WrongAsset(address asset, address token);
    /// @notice The price is zero or does not fit 128 bits.
    error BadPrice(uint256 price);
    /// @notice Buyer, seller and arbiter must differ, none may be this contract, the first two exist.
    error BadParties(address buyer, address seller, address arbiter);
    /// @notice A bond needs an arbiter and may not exceed the price.
    error BadBond(uint256 bond, uint256 price, address arbiter);
    /// @notice The part for the seller exceeds the price.
    error SplitAbovePrice(uint256 toSeller, uint256 price);
    /// @notice Needed: lockBy < deliverBy <= now + 30 days.
    error BadTimes(uint256 lockBy, uint256 deliverBy);
    /// @notice Needed: each at most 30 days, disputeSecs > 0, with an arbiter all > 0.
    error BadWindows(uint256 disputeSecs, uint256 answerSecs, uint256 ruleSecs);
    /// @notice A stake needs a vault and a vault a stake, both an arbiter, and the stake fits 128 bits.
    error BadStake(address vault, uint256 stake, address arbiter);
    /// @notice The penalty exceeds the stake.
    error PenaltyAboveStake(uint256 penalty, uint256 stake);
    /// @notice No arbiter was agreed, so there is nobody to hear a dispute.
    error NoArbiter(uint256 jobId);
    /// @notice The funding kind is unknown, or its signature is not 65 bytes.
    error BadFunding(uint8 kind, uint256 signatureLength);
    error NothingOwed(address to);

    /// @notice Opens a deal: checks both consents, reserves the seller's stake, takes the price from the
    /// buyer. Anybody may call; the caller's own signature may be empty.
    function open(Terms calldata terms, bytes calldata buyerSig, bytes calldata sellerSig, Funding calldata funding)
        external
        returns (uint256 jobId);

    /// @notice `submit` for whoever carries the seller's Delivery signature.
    function deliver(Terms calldata terms, bytes32 deliverable, bytes calldata sellerSig) external;

    /// @notice Ends a deal by consent: `toSeller` to the seller, the rest to the buyer. The buyer must
    /// consent; the seller too if nothing was delivered or if he gets less than the price.
    /// @dev `deliverable` is signed and logged, not stored.
    function settle(
        Terms calldata terms,
        bytes32 deliverable,
        uint256 toSeller,
        bytes calldata buyerSig,
        bytes calldata sellerSig
    ) external;

    /// @notice `settle`, row by row. One bad row reverts all: simulate first.
    function settleMany(Settle[] calldata rows) external;

    /// @notice The seller gives the job back before `deliverBy`: all to the buyer.
    function decline(Terms calldata terms) external;

    /// @notice The buyer objects to a delivery and posts the bond.
    function dispute(Terms calldata terms, bytes32 evidence, bytes calldata buyerSig, Funding calldata funding)
        external;

    /// @notice The seller stands by his delivery and posts the bond.
    function answer(Terms calldata terms, bytes32 evidence, bytes calldata sellerSig, Funding calldata funding)
        external;

    /// @notice The arbiter decides. Its fee is one bond; each side pays it in proportion to its loss.
    function rule(Terms calldata terms, uint256 toSeller, uint256 penalty, bytes32 evidence, bytes calldata sig)
        external;

    /// @notice Brings about the outcome of silence. Anybody may call, once the limit has passed.
    function poke(Terms calldata terms) external;

    /// @notice Sends what is owed to `to`, to `to`. Anybody may call.
    function withdraw(address to) external;

    /// @notice Buyer or seller makes these Terms, not yet opened, unopenable.
    function cancel(Terms calldata terms) external;

    /// @notice The calling seller burns up to 256 of its nonces: those of `word` whose bit is in `mask`.
    function invalidate(uint256 word, uint256 mask) external;

    /// @notice The id of the deal: the EIP-712 digest of its Terms.
    function jobId(Terms calldata terms) external view returns (uint256);

    /// @notice How the deal ended, and the penalty that the arbiter ruled.
    function outcome(uint256 id) external view returns (How how, uint256 penalty);

    /// @notice The stored state. Phase: 0 plain job, 1 working, 2 delivered, 3 disputed, 4 answered,
    /// 16 + How closed, 31 cancelled before opening. Clock: deliverBy, then the time of the last step.
    function deal(uint256 id)
        external
        view
        returns (
            Status status,
            uint8 phase,
            uint256 expiredAt,
            uint256 clock,
            uint256 budget,
            uint256 penalty,
            address provider
        );

    /// @notice 256 nonces of a seller; a set bit can open nothing.
    function nonceBitmap(address seller, uint256 word) external view returns (uint256);

    /// @notice What a failed payment left here for `to`.
    function owed(address to) external view returns (uint256);
}
