// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {IERC3009} from "@openzeppelin/contracts/interfaces/draft-IERC3009.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

import {Consent} from "./Consent.sol";
import {ERC8183Kernel} from "./ERC8183Kernel.sol";
import {IStakeVault} from "./IStakeVault.sol";

/// @title The rules of deals: who may do what until when, and what each silence means
/// @notice Optimistic: a delivery is taken as good unless the buyer objects in time.
///
/// Every deal ends without anybody's help: each live phase has one limit, all limits lie before
/// `expiredAt`, after a limit `poke` is open to all, and no payment can make it revert.
abstract contract OptimisticEvaluator is ERC8183Kernel, EIP712 {
    bytes32 public constant WORK_TYPEHASH = keccak256(
        "Work(string capability,bytes32 schemas,bytes32 task,string pricing,uint256 inputPrice,uint256 cachedInputPrice,uint256 outputPrice,uint256 secondPrice,uint256 inputMax,uint256 outputMax,uint256 quality,string model,string verification,string tokenizer,string settlement)"
    );
    bytes32 public constant TERMS_TYPEHASH = keccak256(
        "Terms(address buyer,address seller,address asset,uint256 price,address arbiter,uint256 bond,uint256 defaultToSeller,uint256 lockBy,uint256 deliverBy,uint256 disputeSecs,uint256 answerSecs,uint256 ruleSecs,address vault,uint256 stake,Work work,uint256 nonce)Work(string capability,bytes32 schemas,bytes32 task,string pricing,uint256 inputPrice,uint256 cachedInputPrice,uint256 outputPrice,uint256 secondPrice,uint256 inputMax,uint256 outputMax,uint256 quality,string model,string verification,string tokenizer,string settlement)"
    );
    bytes32 public constant SETTLEMENT_TYPEHASH =
        keccak256("Settlement(uint256 jobId,bytes32 deliverable,uint256 toSeller)");
    bytes32 public constant DELIVERY_TYPEHASH = keccak256("Delivery(uint256 jobId,bytes32 deliverable)");
    bytes32 public constant DISPUTE_TYPEHASH = keccak256("Dispute(uint256 jobId,bytes32 evidence)");
    bytes32 public constant ANSWER_TYPEHASH = keccak256("Answer(uint256 jobId,bytes32 evidence)");
    bytes32 public constant RULING_TYPEHASH =
        keccak256("Ruling(uint256 jobId,uint256 toSeller,uint256 penalty,bytes32 evidence)");

    uint8 internal constant BY_ALLOWANCE = 0;
    uint8 internal constant BY_PERMIT = 1;
    uint8 internal constant BY_AUTHORIZATION = 2;

    /// @dev Bounds the life of a deal: the longest is deliverBy and three windows, 120 days.
    uint256 internal constant SPAN_MAX_SECS = 30 days;

    mapping(address seller => mapping(uint256 word => uint256 bits)) public nonceBitmap;

    constructor() EIP712("Coase JobEscrow", "1") {}

    // ---------------------------------------------------------------------------------- opening

    function open(Terms calldata terms, bytes calldata buyerSig, bytes calldata sellerSig, Funding calldata funding)
        external
        nonReentrant
        returns (uint256 id)
    {
        _checkTerms(terms);
        id = jobId(terms);
        if (block.timestamp > terms.lockBy) revert TooLate(id, terms.lockBy);
        _checkConsent(terms.buyer, bytes32(id), buyerSig);
        _checkConsent(terms.seller, bytes32(id), sellerSig);
        _checkUnused(id);
        _useNonce(terms.seller, terms.nonce);

        uint256 expiredAt = terms.deliverBy + terms.disputeSecs + terms.answerSecs + terms.ruleSecs + 1;
        _jobs[id] = Job(terms.seller, uint40(expiredAt), Status.Funded, WORKING, uint40(terms.deliverBy));
        _amounts[id].budget = uint128(terms.price);
        emit JobCreated(id, address(this), terms.seller, address(this), expiredAt, address(0));
        emit BudgetSet(id, terms.price);
        emit JobFunded(id, address(this), terms.price);
        emit DealOpened(id, terms.buyer, terms.seller, terms);

        // All or nothing: without its slice of the seller's stake the deal does not open.
        if (terms.stake != 0) IStakeVault(terms.vault).reserve(terms.seller, terms.stake, id);
        _collect(terms.buyer, terms.price, funding, bytes32(id));
    }

    function cancel(Terms calldata terms) external nonReentrant {
        uint256 id = jobId(terms);
        if (msg.sender != terms.buyer && msg.sender != terms.seller) revert NotAllowed(id, msg.sender);
        _checkUnused(id);
        // Under this id only, so that nobody can burn a nonce that is not his.
        Job storage job = _jobs[id];
        job.status = Status.Rejected;
        job.phase = CANCELLED;
        emit TermsCancelled(id, msg.sender);
    }

    function invalidate(uint256 word, uint256 mask) external nonReentrant {
        nonceBitmap[msg.sender][word] |= mask;
        emit NoncesInvalidated(msg.sender, word, mask);
    }

    // --------------------------------------------------------------------------------- the acts

    function deliver(Terms calldata terms, bytes32 deliverable, bytes calldata sellerSig) external nonReentrant {
        (uint256 id, Job memory job) = _dealIn(terms, WORKING);
        if (job.status != Status.Funded) revert WrongStatus(id, job.status);
        _checkInTime(id, job.clock);
        _checkConsent(terms.seller, _digest(keccak256(abi.encode(DELIVERY_TYPEHASH, id, deliverable))), sellerSig);
        _submit(id, job, deliverable);
    }

    function decline(Terms calldata terms) external nonReentrant {
        (uint256 id, Job memory job) = _dealIn(terms, WORKING);
        if (msg.sender != terms.seller) revert NotAllowed(id, msg.sender);
        _checkInTime(id, job.clock);
        _close(id, job, terms, 0, How.Declined, _reasonOf(How.Declined));
    }

    function dispute(Terms calldata terms, bytes32 evidence, bytes calldata buyerSig, Funding calldata funding)
        external
        nonReentrant
    {
        (uint256 id, Job memory job) = _dealIn(terms, DELIVERED);
        if (terms.arbiter == address(0)) revert NoArbiter(id);
        _checkInTime(id, job.clock + terms.disputeSecs);
        _checkConsent(terms.buyer, _digest(keccak256(abi.encode(DISPUTE_TYPEHASH, id, evidence))), buyerSig);

        // Without a bond there is nothing that an answer could post: the arbiter's time starts.
        job.phase = terms.bond == 0 ? ANSWERED : DISPUTED;
        job.clock = uint40(block.timestamp);
        _jobs[id] = job;
        emit DealDisputed(id, terms.buyer, evidence);
        _collect(terms.buyer, terms.bond, funding, keccak256(abi.encode(id, 1)));
    }

    function answer(Terms calldata terms, bytes32 evidence, bytes calldata sellerSig, Funding calldata funding)
        external
        nonReentrant
    {
        (uint256 id, Job memory job) = _dealIn(terms, DISPUTED);
        _checkInTime(id, job.clock + terms.answerSecs);
        _checkConsent(terms.seller, _digest(keccak256(abi.encode(ANSWER_TYPEHASH, id, evidence))), sellerSig);

        job.phase = ANSWERED;
        job.clock = uint40(block.timestamp);
        _jobs[id] = job;
        emit DealAnswered(id, terms.seller, evidence);
        _collect(terms.seller, terms.bond, funding, keccak256(abi.encode(id, 2)));
    }

    function rule(Terms calldata terms, uint256 toSeller, uint256 penalty, bytes32 evidence, bytes calldata sig)
        external
        nonReentrant
    {
        (uint256 id, Job memory job) = _dealIn(terms, ANSWERED);
        _checkInTime(id, job.clock + terms.ruleSecs);
        if (toSeller > terms.price) revert SplitAbovePrice(toSeller, terms.price);
        if (penalty > terms.stake) revert PenaltyAboveStake(penalty, terms.stake);
        _checkConsent(
            terms.arbiter, _digest(keccak256(abi.encode(RULING_TYPEHASH, id, toSeller, penalty, evidence))), sig
        );

        if (penalty != 0) _amounts[id].penalty = uint128(penalty);
        emit DealRuled(id, terms.arbiter, toSeller, penalty, evidence);
        _close(id, job, terms, toSeller, How.Ruled, evidence);
    }

    function settle(
        Terms calldata terms,
        bytes32 deliverable,
        uint256 toSeller,
        bytes calldata buyerSig,
        bytes calldata sellerSig
    ) external nonReentrant {
        _settle(terms, deliverable, toSeller, buyerSig, sellerSig);
    }

    function settleMany(Settle[] calldata rows) external nonReentrant {
        for (uint256 i = 0; i < rows.length; ++i) {
            Settle calldata row = rows[i];
            _settle(row.terms, row.deliverable, row.toSeller, row.buyerSig, row.sellerSig);
        }
    }

    // ---------------------------------------------------------------------------------- silence

    function poke(Terms calldata terms) external nonReentrant {
        uint256 id = jobId(terms);
        Job memory job = _jobs[id];
        // The table of silence. Expired deals pass too: expiry changes nobody's share.
        (uint256 limit, uint256 toSeller, How how) = (0, 0, How.Open);
        if (job.phase == WORKING) {
            (limit, how) = (job.clock, How.Undelivered);
        } else if (job.phase == DELIVERED) {
            (limit, toSeller, how) = (job.clock + terms.disputeSecs, terms.price, How.SilentBuyer);
        } else if (job.phase == DISPUTED) {
            (limit, how) = (job.clock + terms.answerSecs, How.SilentSeller);
        } else if (job.phase == ANSWERED) {
            (limit, toSeller, how) = (job.clock + terms.ruleSecs, terms.defaultToSeller, How.SilentArbiter);
        } else {
            revert WrongPhase(id, job.phase);
        }
        if (block.timestamp <= limit) revert TooEarly(id, limit);
        _close(id, job, terms, toSeller, how, _reasonOf(how));
    }

    // ------------------------------------------------------------------------------------ views

    function jobId(Terms calldata terms) public view returns (uint256) {
        // All fields are static words, so this is the EIP-712 encoding: type hash, then each in turn.
        return uint256(_digest(keccak256(abi.encode(TERMS_TYPEHASH, terms))));
    }

    function outcome(uint256 id) external view returns (How how, uint256 penalty) {
        uint8 phase = _jobs[id].phase;
        if (phase > CLOSED && phase < CANCELLED) how = How(phase - CLOSED);
        penalty = _amounts[id].penalty;
    }

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
        )
    {
        Job memory job = _jobs[id];
        Amounts memory amounts = _amounts[id];
        return (job.status, job.phase, job.expiredAt, job.clock, amounts.budget, amounts.penalty, job.provider);
    }

    // ---------------------------------------------------------------------------------- closing

    function _settle(
        Terms calldata terms,
        bytes32 deliverable,
        uint256 toSeller,
        bytes calldata buyerSig,
        bytes calldata sellerSig
    ) private {
        uint256 id = jobId(terms);
        Job memory job = _jobs[id];
        if (job.phase < WORKING || job.phase > ANSWERED) revert WrongPhase(id, job.phase);
        if (job.status == Status.Expired) revert WrongStatus(id, job.status);
        if (toSeller > terms.price) revert SplitAbovePrice(toSeller, terms.price);
        bytes32 digest = _digest(keccak256(abi.encode(SETTLEMENT_TYPEHASH, id, deliverable, toSeller)));
        _checkConsent(terms.buyer, digest, buyerSig);
        // Nobody needs to be asked whether he takes the whole price for what he delivered.
        if (job.phase == WORKING || toSeller < terms.price) _checkConsent(terms.seller, digest, sellerSig);

        if (job.phase == WORKING && toSeller > 0) {
            job.phase = DELIVERED;
            job.clock = uint40(block.timestamp);
            emit JobSubmitted(id, terms.seller, deliverable);
        }
        _close(id, job, terms, toSeller, How.Settled, _reasonOf(How.Settled));
    }

    /// @dev The one way out: `toSeller` to the seller, the rest of the price to the buyer, bonds to
    /// their owners or, after a ruling, one of the two to the arbiter.
    function _close(uint256 id, Job memory job, Terms calldata terms, uint256 toSeller, How how, bytes32 reason)
        private
    {
        uint256 toBuyer = terms.price - toSeller;
        uint256 buyerBond = job.phase == DISPUTED || job.phase == ANSWERED ? terms.bond : 0;
        uint256 sellerBond = job.phase == ANSWERED ? terms.bond : 0;
        uint256 fee = 0;
        if (how == How.Ruled) {
            // Of two bonds one is the fee. Each side pays of it what it lost of the price.
            fee = terms.bond;
            buyerBond = (terms.bond * toBuyer) / terms.price;
            sellerBond = terms.bond - buyerBond;
        }

        if (job.status != Status.Expired) {
            if (toSeller > 0) {
                job.status = Status.Completed;
                emit JobCompleted(id, address(this), reason);
                emit PaymentReleased(id, terms.seller, toSeller);
            } else {
                job.status = Status.Rejected;
                emit JobRejected(id, address(this), reason);
                emit Refunded(id, address(this), terms.price);
            }
        }
        // The clock of a closed deal is the time of its submission, where that is still known.
        if (job.phase != DELIVERED) job.clock = 0;
        job.phase = CLOSED + uint8(how);
        _jobs[id] = job;
        emit DealSettled(id, terms.buyer, terms.seller, toSeller, toBuyer, how);

        _push(terms.seller, toSeller + sellerBond);
        _push(terms.buyer, toBuyer + buyerBond);
        _push(terms.arbiter, fee);
    }

    // ----------------------------------------------------------------------------------- checks

    function _checkTerms(Terms calldata terms) private view {
        address buyer = terms.buyer;
        address seller = terms.seller;
        address arbiter = terms.arbiter;
        if (terms.asset != token) revert WrongAsset(terms.asset, token);
        if (terms.price == 0 || terms.price > type(uint128).max) revert BadPrice(terms.price);
        if (
            buyer == address(0) || seller == address(0) || buyer == seller || arbiter == buyer || arbiter == seller
                || buyer == address(this) || seller == address(this) || arbiter == address(this)
        ) revert BadParties(buyer, seller, arbiter);
        if (terms.defaultToSeller > terms.price) revert SplitAbovePrice(terms.defaultToSeller, terms.price);
        if (terms.bond > terms.price || (arbiter == address(0) && terms.bond != 0)) {
            revert BadBond(terms.bond, terms.price, arbiter);
        }
        // Without an arbiter a garbage delivery would be a free way round the penalty.
        if (
            (terms.vault == address(0)) != (terms.stake == 0) || terms.stake > type(uint128).max
                || (arbiter == address(0) && terms.stake != 0)
        ) revert BadStake(terms.vault, terms.stake, arbiter);
        if (terms.lockBy >= terms.deliverBy || terms.deliverBy > block.timestamp + SPAN_MAX_SECS) {
            revert BadTimes(terms.lockBy, terms.deliverBy);
        }
        if (
            terms.disputeSecs == 0 || terms.disputeSecs > SPAN_MAX_SECS || terms.answerSecs > SPAN_MAX_SECS
                || terms.ruleSecs > SPAN_MAX_SECS
                || (arbiter != address(0) && (terms.answerSecs == 0 || terms.ruleSecs == 0))
        ) revert BadWindows(terms.disputeSecs, terms.answerSecs, terms.ruleSecs);
    }

    /// @dev A caller counts as his own signature.
    function _checkConsent(address signer, bytes32 digest, bytes calldata sig) private view {
        if (msg.sender != signer && !Consent.isBy(signer, digest, sig)) revert BadSignature(signer);
    }

    function _checkUnused(uint256 id) private view {
        if (_jobs[id].phase != PLAIN) revert JobExists(id);
    }

    function _checkInTime(uint256 id, uint256 limit) private view {
        if (block.timestamp > limit) revert TooLate(id, limit);
    }

    function _useNonce(address seller, uint256 nonce) private {
        uint256 word = nonceBitmap[seller][nonce >> 8];
        uint256 bit = 1 << (nonce & 0xff);
        if (word & bit != 0) revert NonceUsed(seller, nonce);
        nonceBitmap[seller][nonce >> 8] = word | bit;
    }

    function _dealIn(Terms calldata terms, uint8 phase) private view returns (uint256 id, Job memory job) {
        id = jobId(terms);
        job = _jobs[id];
        if (job.phase != phase) revert WrongPhase(id, job.phase);
    }

    /// @dev Takes money from a party of the Terms, who consented just above, and from nobody else.
    /// @param nonce what an EIP-3009 authorisation must carry, so that it can pay this and nothing else
    function _collect(address from, uint256 amount, Funding calldata funding, bytes32 nonce) private {
        if (amount == 0) return;
        if (funding.kind == BY_ALLOWANCE) return _pull(from, amount);
        if (funding.kind > BY_AUTHORIZATION || funding.sig.length != 65) {
            revert BadFunding(funding.kind, funding.sig.length);
        }
        (uint8 v, bytes32 r, bytes32 s) = ECDSA.parseCalldata(funding.sig);
        if (funding.kind == BY_PERMIT) {
            // Somebody may have sent this permit before us: then the allowance is there all the same.
            try IERC20Permit(token).permit(from, address(this), amount, funding.deadline, v, r, s) {} catch {}
            return _pull(from, amount);
        }
        uint256 balance = IERC20(token).balanceOf(address(this));
        IERC3009(token).receiveWithAuthorization(
            from, address(this), amount, funding.validAfter, funding.deadline, nonce, v, r, s
        );
        _checkReceived(balance, amount);
    }

    function _reasonOf(How how) private pure returns (bytes32) {
        return bytes32(uint256(how));
    }

    function _digest(bytes32 structHash) private view returns (bytes32) {
        return _hashTypedDataV4(structHash);
    }
}
